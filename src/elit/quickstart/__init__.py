"""All of the library, once through."""
