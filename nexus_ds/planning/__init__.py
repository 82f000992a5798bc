"""What a run will need and how long it will take, as pure functions of its configuration."""
