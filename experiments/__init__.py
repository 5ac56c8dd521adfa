"""The jobs: each a thin absl main over the library."""
