"""From images to compiled sets: sources, the .beton writer, verification."""
