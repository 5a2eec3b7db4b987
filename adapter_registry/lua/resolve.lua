-- The READY version that a reference means, for a tenant that may call it.
-- KEYS: versions, aliases, digests, access, splits, guards.
-- ARGV: by, value, tenant that asks if it is another, or '', point in [0, 1) or '' for none.
-- Answers {number, envelope, alias that is watched or '', then number and envelope of its shadow if this request has one}, or
-- nil. Alias and version are read in one script, so a move between them cannot be seen.
local function ready(number)
  local stored = number and redis.call('HGET', KEYS[1], number)
  if stored and cjson.decode(stored).record.state == 'ready' then
    return {number, stored, ''}
  end
  return false
end

if ARGV[3] ~= '' then
  local access = cjson.decode(redis.call('GET', KEYS[4]) or '{}')
  local allowed = access.public
  for _, tenant in ipairs(access.tenants or {}) do allowed = allowed or tenant == ARGV[3] end
  if not allowed then return false end
end

local by, value = ARGV[1], ARGV[2]
if by == 'version' then return ready(value) end
if by == 'digest' then return ready(redis.call('HGET', KEYS[3], value)) end
local alias = by == 'alias' and value or 'prod'
local split = redis.call('HGET', KEYS[5], alias)
local pinned = redis.call('HGET', KEYS[2], alias)
local watched = pinned and (split or redis.call('HEXISTS', KEYS[6], alias) == 1) and alias or ''
local found = ready(pinned)
if split and ARGV[4] ~= '' then
  local part = cjson.decode(split)
  local other = tonumber(ARGV[4]) < part.weight and ready(part.version)
  if other and part.shadow and found then return {found[1], found[2], watched, other[1], other[2]} end
  if other and not part.shadow then found = other end
end
if found then return {found[1], found[2], watched} end
if pinned or by == 'alias' then return false end
local numbers = redis.call('HKEYS', KEYS[1])
table.sort(numbers, function(a, b) return tonumber(a) > tonumber(b) end)
for _, number in ipairs(numbers) do
  local found = ready(number)
  if found then return found end
end
return false
