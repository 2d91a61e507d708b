"""The version of the package, for those that may not import the package itself."""

VERSION = "0.1.0"
