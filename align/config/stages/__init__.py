"""The stages: one file each, which defines `STAGE`. A file that is added here is a new stage."""
