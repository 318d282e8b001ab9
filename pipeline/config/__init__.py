"""Configuration of a run: recipes, their specs, and DeepSpeed's configuration file."""
