-- With blobs.lua.
-- Blobs that nobody knows of become garbage. KEYS: refs, garbage, deleting. ARGV: sha256s. Answers how many there were.
local found = 0
for _, sha in ipairs(ARGV) do
  if not is_held(KEYS[1], KEYS[2], sha) and not redis.call('ZSCORE', KEYS[3], sha) then
    redis.call('ZADD', KEYS[2], now_ms(), sha)
    found = found + 1
  end
end
return found
