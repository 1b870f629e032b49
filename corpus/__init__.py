"""What is read: documents, tokenizer, packed token shards and their manifest."""
