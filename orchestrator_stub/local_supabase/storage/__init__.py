"""Supabase Storage's endpoints, over rows in `storage.objects` and files in one directory.

Layers: `server` puts the routes together; `buckets`, `objects`, `listing` and `uploads` are its endpoints;
`incoming` reads what is uploaded; `store` is what they share; `errors` is the original's form of a refusal.
"""
