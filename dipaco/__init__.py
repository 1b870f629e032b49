"""The front door: the `dipaco` command and the small public Python API."""
