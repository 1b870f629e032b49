"""What a run is: the schema (pydantic, unknown keys are errors) and the YAML files of published runs."""
