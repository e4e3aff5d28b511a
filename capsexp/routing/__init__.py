"""One routing algorithm per file: reference, fast path, public function, module."""
