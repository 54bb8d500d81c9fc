"""The configuration: schema, YAML documents with line numbers, and their checks."""
