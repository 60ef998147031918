"""Files that hold weights, each format read and written tensor by tensor, whatever its size."""
