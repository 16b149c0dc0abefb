"""What agents can do.

base        what a tool is, who calls it, what it answers
function    a typed Python function as a tool; schema: what its annotations say of JSON
registry    checks and runs calls, and never raises what a tool raised; validation, shorten: its parts
artifacts   results that are too long for a conversation
files       a folder that cannot be left (confined)
fetch       the web, without addresses of one's own (addresses)
search      a local corpus
python      code in a sandbox
mcp         tools of MCP servers
human       questions to people, and calls that wait for their consent
"""
