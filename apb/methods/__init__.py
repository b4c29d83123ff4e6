"""Methods: how one prefill is spread over blocks and ranks. All of them leave the same cache."""
