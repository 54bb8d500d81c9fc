"""The shared decoder: parts that model families compose.  A library; it registers no plugin."""
