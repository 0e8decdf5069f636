"""Write-back: what a tool in a container made (a lock file, a route tree) goes back into the project. Rules in the
database say which paths may, and it judges every offer itself; this room mints the token that an offer needs, checks
lock files, asks as the role that may do nothing else, and brings what came back into the directory of `dev`. Above
`http`, whose routes it adds to. Promises that nothing is written here but through `preview.write_back`.
"""
