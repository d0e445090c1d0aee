"""T5 (Raffel et al., 2020, https://arxiv.org/abs/1910.10683), which is refused."""

from keras_kvcache.families.family import Family

FAMILY = Family(
    "T5",
    refused={
        "T5Backbone": ", whose relative positions are a bias added to attention "
        "scores, which the encoder and decoder here have no option for yet"
    },
)
