"""Code shared by several training objectives."""
