"""`python -m pipeline`, the same as the command `pipeline`. Imported by nobody."""

from importlib import import_module

import_module("stages.cli").main()
