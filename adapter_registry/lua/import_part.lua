-- With blobs.lua.
-- Hold a part of an import's files, once it was claimed and put. KEYS: items, parts, refs, garbage, sizes.
-- ARGV: id, which part, sha256. Answers 'ok', 'missing', 'closed' or 'unclaimed'.
local stored = redis.call('HGET', KEYS[1], ARGV[1])
if not stored then return 'missing' end
if cjson.decode(string.match(stored, '^%S+ (.*)$')).state ~= 'registered' then return 'closed' end
local before = redis.call('HGET', KEYS[2], ARGV[2])
if before == ARGV[3] then return 'ok' end
if not is_held(KEYS[3], KEYS[4], ARGV[3]) then return 'unclaimed' end
redis.call('HSET', KEYS[2], ARGV[2], ARGV[3])
hold(KEYS[3], KEYS[4], KEYS[5], ARGV[3])
if before then release(KEYS[3], KEYS[4], KEYS[5], before) end
return 'ok'
