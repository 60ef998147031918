"""Other programs' files of the same weights: read and written tensor by tensor, whatever their size."""
