"""Every private or version-dependent name of torch, its compiler and Lightning that this package uses."""
