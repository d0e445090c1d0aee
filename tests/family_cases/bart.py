from family_cases.sizes import ENCODER_DECODER

HUB_PAIRS = {"bart": ("Bart", dict(ENCODER_DECODER, max_sequence_length=113))}
