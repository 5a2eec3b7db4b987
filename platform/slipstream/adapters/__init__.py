"""What an adapter is: formats, validation of one file set, and its weights in one canonical form."""
