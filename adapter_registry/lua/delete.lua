-- With blobs.lua.
-- Remove one version, or (version '') all of them with their aliases; blobs that nothing refers to become garbage.
-- KEYS: names, versions, digests, aliases, refs, garbage, access, log of aliases, where aliases were, audit,
-- splits, sizes, guards, outcomes, what was told of them.
-- ARGV: name, version or '', who, audit entries to keep.
-- Answers {'missing'}, {'in_use', alias} or {'removed', number, envelope, '1' if nothing has its content any more, ...}.
local doomed = {}
if ARGV[2] == '' then
  doomed = redis.call('HKEYS', KEYS[2])
elseif redis.call('HEXISTS', KEYS[2], ARGV[2]) == 1 then
  local aliases = redis.call('HGETALL', KEYS[4])
  for i = 1, #aliases, 2 do
    if aliases[i + 1] == ARGV[2] then return {'in_use', aliases[i]} end
  end
  local splits = redis.call('HGETALL', KEYS[11])
  for i = 1, #splits, 2 do
    if tostring(cjson.decode(splits[i + 1]).version) == ARGV[2] then return {'in_use', splits[i]} end
  end
  doomed = {ARGV[2]}
end
if #doomed == 0 then return {'missing'} end

local answer = {'removed'}
for _, number in ipairs(doomed) do
  local stored = redis.call('HGET', KEYS[2], number)
  local envelope = cjson.decode(stored)
  for _, sha in ipairs(envelope.blobs) do release(KEYS[5], KEYS[6], KEYS[12], sha) end
  redis.call('HDEL', KEYS[2], number)
  redis.call('HDEL', KEYS[3], envelope.digest)
  redis.call(
    'XADD', KEYS[10], 'MAXLEN', '~', ARGV[4], '*', 'by', ARGV[3], 'action', 'version.deleted',
    'subject', ARGV[1] .. '@' .. number, 'detail', envelope.digest
  )
  answer[#answer + 1] = number
  answer[#answer + 1] = stored
  answer[#answer + 1] = redis.call('HEXISTS', KEYS[5], string.sub(envelope.digest, 8)) == 1 and '0' or '1'
end
if redis.call('HLEN', KEYS[2]) == 0 then
  redis.call('DEL', KEYS[4], KEYS[7], KEYS[8], KEYS[9], KEYS[11], KEYS[13], KEYS[14], KEYS[15])  -- a name that is used again is not shared, and has no past
  redis.call('SREM', KEYS[1], ARGV[1])
end
return answer
