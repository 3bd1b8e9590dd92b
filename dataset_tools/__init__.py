"""From pictures to compiled sets: sources, the .beton writer, verification."""
