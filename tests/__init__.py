"""The folders are those of the package, each with what it does; and `law`, `foreign`, `support` and `needs`."""
