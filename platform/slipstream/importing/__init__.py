"""Adapters that do not come as one form of files: in parts, in an archive, or from where somebody else keeps them."""
