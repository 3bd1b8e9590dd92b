"""Installing the project: the doctor, and archives for machines without a network."""
