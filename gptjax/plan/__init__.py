"""What a run needs, takes and costs on hardware that is not here: compiled for it, and estimated."""
