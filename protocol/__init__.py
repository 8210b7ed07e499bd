"""The contracts: the wire, records as bytes, content-addressed blobs, `PacedGrid` and its events."""
