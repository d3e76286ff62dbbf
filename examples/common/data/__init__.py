"""The files of E2E and GLUE, read and checked."""
