"""A NumPyClient and a server_fn, the model asked of a client."""
