"""`python -m keras_kvcache`."""

import sys

from keras_kvcache.cli import main

sys.exit(main())
