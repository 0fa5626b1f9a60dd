"""Tables as text: bytes, records, columns. `table_files` reads them."""
