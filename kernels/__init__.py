"""The layers: one folder a layer, with its equations in ``reference.py`` and its test inputs in ``cases.py``."""
