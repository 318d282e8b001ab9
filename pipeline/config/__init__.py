"""What a run is asked to do: recipes, their specs, and DeepSpeed's configuration file."""
