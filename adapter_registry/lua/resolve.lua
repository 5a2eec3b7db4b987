-- The READY version that a reference means. KEYS: versions, aliases, digests. ARGV: by, value.
-- Answers {number, envelope}, or nil. Alias and version are read in one script, so a move between them cannot be seen.
local function ready(number)
  local stored = number and redis.call('HGET', KEYS[1], number)
  if stored and cjson.decode(stored).record.state == 'ready' then
    return {number, stored}
  end
  return false
end

local by, value = ARGV[1], ARGV[2]
if by == 'version' then return ready(value) end
if by == 'digest' then return ready(redis.call('HGET', KEYS[3], value)) end
if by == 'alias' then return ready(redis.call('HGET', KEYS[2], value)) end

local pinned = redis.call('HGET', KEYS[2], 'prod')
if pinned then return ready(pinned) end
local numbers = redis.call('HKEYS', KEYS[1])
table.sort(numbers, function(a, b) return tonumber(a) > tonumber(b) end)
for _, number in ipairs(numbers) do
  local found = ready(number)
  if found then return found end
end
return false
