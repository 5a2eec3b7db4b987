-- With aliases.lua.
-- Count what became of requests of an alias's version, and roll back if its guard says so.
-- The ninth key: ids that were told. ARGV: alias, version, when, entries to keep, the adapter's name, audit entries to keep,
-- seconds of a window without a guard, id, then requests, errors, drafted, accepted, compared, same.
-- Answers {''}, or {why it was rolled back, digest that requests go to now, digest that they went to}.
local names = {'requests', 'errors', 'drafted_tokens', 'accepted_tokens', 'compared', 'same'}
local alias, version = ARGV[1], ARGV[2]
local split = redis.call('HGET', KEYS[6], alias)
local part = split and cjson.decode(split)
local newest = part and string.format('%d', part.version) or redis.call('HGET', KEYS[2], alias)
if version ~= newest and version ~= redis.call('HGET', KEYS[2], alias) then return {''} end  -- it has moved since
local stored = redis.call('HGET', KEYS[7], alias)
if not split and not stored then return {''} end  -- nobody watches it any more
local now = redis.call('TIME')[1]
if redis.call('ZADD', KEYS[9], 'NX', now, ARGV[8]) == 0 then return {''} end  -- told again, because the answer was lost
redis.call('ZREMRANGEBYRANK', KEYS[9], 0, -1001)
local guard = stored and cjson.decode(stored)
local half = (guard and guard.window_s or ARGV[7]) / 2
local bucket = math.floor(now / half)
local sums = {}
for i, name in ipairs(names) do
  local prefix = alias .. '|' .. version .. '|' .. name .. '|'
  sums[name] = redis.call('HINCRBY', KEYS[8], prefix .. bucket, ARGV[8 + i])
  sums[name] = sums[name] + (tonumber(redis.call('HGET', KEYS[8], prefix .. (bucket - 1))) or 0)
end
for _, field in ipairs(redis.call('HKEYS', KEYS[8])) do
  local own = string.match(field, '^' .. string.gsub(alias, '%p', '%%%0') .. '|.*|(%d+)$')
  if own and tonumber(own) < bucket - 1 then redis.call('HDEL', KEYS[8], field) end
end
if not guard or version ~= newest or sums.requests < guard.min_requests then return {''} end
local reason
if type(guard.max_error_rate) == 'number' and sums.errors / sums.requests > guard.max_error_rate then
  reason = sums.errors .. ' of ' .. sums.requests .. ' requests failed'
elseif type(guard.min_acceptance) == 'number' and sums.drafted_tokens > 0
  and sums.accepted_tokens / sums.drafted_tokens < guard.min_acceptance then
  reason = sums.accepted_tokens .. ' of ' .. sums.drafted_tokens .. ' drafted tokens were accepted'
end
local back = reason and version_before(alias)
if not back then return {''} end
local was = digest_of(redis.call('HGET', KEYS[2], alias))
local newest_digest = digest_of(newest)
local by = {who = 'guard', at = ARGV[3], moves_kept = ARGV[4], name = ARGV[5], audit_kept = ARGV[6], reason = reason}
if not move_alias(alias, back, '', '', by) then return {''} end
return {reason, digest_of(back), was ~= digest_of(back) and was or newest_digest}
