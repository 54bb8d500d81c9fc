"""The core's own record of a run, and its console monitor."""
