"""The processes: thin mains, settings, metrics, HTTP API, the embedded stack and the command line."""
