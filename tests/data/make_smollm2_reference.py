"""Records what transformers makes of the SmolLM2 file, for tests to compare with.

Run by hand, with torch and transformers installed:

    python tests/data/make_smollm2_reference.py

It writes smollm2_reference.npz beside itself: for each prompt its ids, the 64
ids that greedy decoding in float32 adds (stop tokens don't stop it), and for the
first prompt the logits of every position at every 97th id of the vocabulary.
"""

from pathlib import Path

import numpy as np
import torch
import transformers

from keras_kvcache import loaders

PROMPTS = (
    "The capital of France is Paris. The capital of Italy is",
    "def fibonacci(n):\n",
    "<|im_start|>user\nWrite a short story about a fox.<|im_end|>\n"
    "<|im_start|>assistant\n",
    "<|im_start|>user\nExplain why the sky is blue to a child.<|im_end|>\n"
    "<|im_start|>assistant\n",
    "Once upon a time, in a village by the sea, there lived",
)
NEW_TOKENS = 64
EVERY = 97

path = loaders.fetch("smollm2_135m_instruct")
tokenizer = loaders.read_gguf(path).tokenizer
model = transformers.AutoModelForCausalLM.from_pretrained(
    str(path.parent), gguf_file=path.name, dtype=torch.float32
)
model.eval()
record = {}
for number, prompt in enumerate(PROMPTS):
    ids = tokenizer.encode(prompt)
    with torch.no_grad():
        # Without a mask it would hide every <|im_end|> of the prompt, which is
        # its padding token too.
        answer = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )[0]
        if number == 0:
            logits = model(torch.tensor([ids])).logits[0, :, ::EVERY].numpy()
            record["logits"] = logits
    record[f"prompt_{number}"] = np.array(ids, "int32")
    record[f"answer_{number}"] = answer[len(ids) :].numpy().astype("int32")
    print(repr(tokenizer.decode(answer.tolist())))
np.savez_compressed(Path(__file__).with_name("smollm2_reference.npz"), **record)
