"""A NumPyClient and the legacy FedAvg through DefaultWorkflow."""
