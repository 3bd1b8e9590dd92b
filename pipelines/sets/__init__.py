"""Where images lie: compiled sets and folders, their manifests, and the order of reading."""
