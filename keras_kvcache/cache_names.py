"""Names of codecs and kinds of caches, read without Keras."""

# What a slot holds: numbers as they are or rounded, or codes.
DTYPES = ("float32", "float16", "bfloat16")
CODED = ("int8", "int4")
# float64 is for comparisons, not for decoding: a model that computes in it has caches
# of it by itself, and the command line doesn't offer it for others.
FLOATS = (*DTYPES, "float64")

# Which slots are kept. `"auto"`: rolling where a layer slides and the text may outgrow
# its window.
KINDS = ("auto", "static", "rolling")
