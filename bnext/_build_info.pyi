# The module is written by setup.py beside the extension.
TORCH_VERSION: str
