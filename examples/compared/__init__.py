"""What the apps that `fedpace compare` comes with have in common: their server, and where their data are."""
