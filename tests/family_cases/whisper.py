from family_cases.sizes import ENCODER_DECODER

HUB_PAIRS = {
    "whisper": (
        "Whisper",
        dict(
            ENCODER_DECODER,
            num_mels=13,
            max_encoder_sequence_length=107,
            max_decoder_sequence_length=109,
        ),
    ),
}
