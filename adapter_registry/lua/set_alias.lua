-- Point an alias at a READY version. KEYS: versions, aliases. ARGV: alias, version. Answers 1, or 0 when there is none.
local stored = redis.call('HGET', KEYS[1], ARGV[2])
if not stored or cjson.decode(stored).record.state ~= 'ready' then return 0 end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
return 1
