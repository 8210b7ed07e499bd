"""Identity: the authority, its certificates, and what they say about who is calling."""
