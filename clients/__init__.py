"""The device: its profile, the agent that keeps it connected, and the workers that run the ClientApp."""
