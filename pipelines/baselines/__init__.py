"""Updates that the papers compare with, and plain sampling."""
